// Moves all clips by one clock: play and pause, the scrubber, arrow keys, and #frame=N in the address.
(() => {
  "use strict";
  const player = document.querySelector(".player");
  if (!player) return;
  const clips = [...document.querySelectorAll(".clip")];
  const button = player.querySelector("button");
  const scrubber = player.querySelector("input");
  const place = player.querySelector("output");
  const frames = Number(scrubber.max);
  const pause = 1000 / Number(player.dataset.fps);
  let frame = 0;
  let timer = null;

  function show(next) {
    frame = ((next % frames) + frames) % frames;
    for (const clip of clips) {
      const context = Number(clip.dataset.context);
      // A clip that has ended waits for the others with its last frame.
      const own = Math.min(frame, Number(clip.dataset.frames) - 1);
      const isGiven = own < context;
      clip.style.setProperty("--frame", own);
      clip.classList.toggle("predicted", !isGiven);
      clip.querySelector(".badge").textContent = isGiven ? "given " + (own + 1) : "predicted " + (own - context + 1);
    }
    scrubber.value = frame + 1;
    place.textContent = "frame " + (frame + 1) + " of " + frames;
    document.documentElement.dataset.frame = frame + 1;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }

  function play() {
    stop();
    timer = setInterval(() => show(frame + 1), pause);
    button.textContent = "Pause";
  }

  function toggle() {
    if (timer === null) play();
    else stop();
  }

  function stepTo(next) {
    stop();
    show(next);
  }

  function followAddress() {
    const wanted = /^#frame=([0-9]+)/.exec(location.hash);
    if (wanted) stepTo(Math.min(Math.max(Number(wanted[1]), 1), frames) - 1);
    return wanted !== null;
  }

  button.addEventListener("click", toggle);
  scrubber.addEventListener("input", () => stepTo(Number(scrubber.value) - 1));
  addEventListener("hashchange", followAddress);
  document.addEventListener("keydown", (event) => {
    // The scrubber has arrow keys of its own, and Space presses a focused button.
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, button, summary")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) stepTo(frame + step);
    else if (event.key === " ") toggle();
    else return;
    event.preventDefault();
  });

  player.hidden = false;
  show(0);
  if (followAddress()) return;
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) stepTo(Number(clips[0].dataset.context));
  else play();
})();
