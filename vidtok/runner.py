"""The one home of Accelerate: devices, precision, the state of a run, stopping, resuming and logging of both training commands.

with Runner(options, config, name="vidtok-train", best="validation_loss") as runner:
    if runner.is_finished:
        return
    model, optimizer = runner.prepare(model, build_optimizer(model, options))
    for step, batches in runner.steps(dataset):
        logs = runner.update(model, optimizer, batches, compute_loss)
        runner.after_step(step, logs, evaluate, save)
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from vidtok import checkpoints
from vidtok.checkpoints import TrainedPart, TrainState
from vidtok.clock import ALL_STEPS, SIGNALLED, TIME_IS_UP, RunClock, renew_plan
from vidtok.interrupts import Interrupts
from vidtok.optimizer import WeightAverage, build_optimizer, describe
from vidtok.processes import from_main, has_fast_bf16, on_main
from vidtok.progress import TrainingProgress
from vidtok.run_folder import RunFolder, Value
from vidtok.run_options import RunOptions, check_options
from vidtok.sampler import StepSampler, build_loader, seed_everything, spread

__all__ = ["ComputeLoss", "Evaluate", "RunOptions", "Runner", "Save", "TrainingError", "build_optimizer"]

ComputeLoss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Any]]]
Evaluate = Callable[[], Mapping[str, float]]
Save = Callable[[Path], None]


class TrainingError(ValueError):
    """Say that training cannot go on (a loss, gradient or evaluation is not finite); the last checkpoint is untouched."""


class Runner:
    """Own one run: its folder, device and clock. Every random draw of step s follows from (seed, s, rank).

    best: the key of `evaluate`'s result that picks model/; the lowest value wins unless best_is_lowest is false.
    Build the model after the Runner, whose seed its first weights then follow. Raises ValueError for impossible options, a folder
    in use, or a folder of another configuration.
    """

    def __init__(
        self,
        options: RunOptions,
        config: Mapping[str, Any],
        name: str,
        *,
        best: str = "validation_loss",
        best_is_lowest: bool = True,
    ) -> None:
        check_options(options)
        self.options = options
        self.path = Path(options.run_dir)
        self._best_key, self._best_is_lowest = best, best_is_lowest
        has_tensorboard = importlib.util.find_spec("tensorboard") is not None
        # Precision is ours (see autocast): Accelerate would rewrite the model's forward and fix one precision for the process.
        self._accelerator = Accelerator(
            mixed_precision="no",
            log_with=["tensorboard"] if has_tensorboard else None,
            project_config=ProjectConfiguration(project_dir=options.run_dir, logging_dir=options.run_dir),
        )
        self._uses_bf16 = options.precision == "bf16" or (options.precision == "auto" and has_fast_bf16(self.device))
        self._progress = TrainingProgress(name, self._accelerator.is_main_process)
        self._interrupts = Interrupts()
        self._parts: dict[str, TrainedPart] = {}
        self._rate_shares: dict[str, list[float]] = {}
        self._current, self._exit_status = 1, 0
        self._clips = options.batch_size * options.gradient_accumulation * self._accelerator.num_processes
        self._folder: RunFolder | None = None
        self._state, self._resume_from = on_main(lambda: self._open(config, name))
        self._clock = RunClock(options, self._state)
        if not has_tensorboard:
            self.say("No TensorBoard curves: `pip install tensorboard` adds them (metrics.jsonl is written in any case).")
        elif not self.is_finished:
            # Events of steps that will run again are hidden, as they are dropped from metrics.jsonl.
            self._accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})
        self.seed_step(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the folder, the signal handlers and the terminal."""
        self._progress.close()
        self._interrupts.restore()
        for tracker in getattr(self._accelerator, "trackers", []):
            tracker.finish()
        self._accelerator.trackers = []
        if self._folder is not None:
            self._folder.close()

    @property
    def device(self) -> torch.device:
        """Give the device of this process."""
        return self._accelerator.device

    @property
    def step(self) -> int:
        """Give the number of finished optimizer steps."""
        return self._state.step

    @property
    def planned_steps(self) -> int | None:
        """Give the last step once minutes are planned; None before, and in a run limited by steps alone."""
        return None if self._clock.plan is None else self._clock.horizon

    @property
    def is_finished(self) -> bool:
        """Tell whether an earlier start has done all steps or used up the minutes; `steps` then says so and gives nothing."""
        return self._clock.is_finished

    def say(self, text: str) -> None:
        """Print one line, once for all processes."""
        self._progress.say(text)

    def check_data(self, name: str, fingerprint: str) -> None:
        """Keep the fingerprint of the data called `name`; raises ValueError when an earlier start trained on other data."""
        kept = self.first_value(f"data {name}", fingerprint)
        if kept != fingerprint:
            raise ValueError(
                f"{self.path} was trained on {name} with fingerprint {kept}, but now they have {fingerprint}: "
                "give back the old ones, or another run_dir."
            )

    def first_value(self, name: str, value: Value) -> Value:
        """Give what the run's first start gave under this name, in every process; before the first checkpoint, what the last one gave."""
        return on_main(lambda: value if self._folder is None else self._folder.first_value(name, value))

    def report(self, model: nn.Module, optimizer: Optimizer, memory_bytes: int | None = None) -> None:
        """Print parameters, untrained tensors, the caller's memory estimate, and how the run steps."""
        horizon = self._clock.horizon
        steps = [step for step in (1, 10, 100) if horizon is None or step <= horizon]
        rates = ", ".join(f"{self._clock.learning_rate(step):.2e} at step {step}" for step in steps)
        devices = f"{self._accelerator.num_processes} x {self.device.type}, {'bf16' if self._uses_bf16 else 'fp32'}"
        lines = describe(self.unwrap(model), optimizer, memory_bytes)
        self.say("\n".join([*lines, f"{devices}, {self._clips} clips a step, lr {rates}"]))

    def prepare(self, model: nn.Module, optimizer: Optimizer, name: str = "model") -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer on the device, in every process; they belong to the checkpoints under `name`.

        Weights are averaged (ema_decay) for the part called "model" only. A second part (a discriminator) is a second call.
        """
        if self.options.gradient_checkpointing:
            # Every PreTrainedModel has the method; without this flag it raises an error that is not ours.
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise ValueError(f"{type(model).__name__} cannot recompute activations: set gradient_checkpointing=false.")
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        if self.options.compile:
            model.compile()  # in place, so that no key of the state dict is renamed
        model.train()
        self._rate_shares[name] = [group["lr"] / self.options.lr for group in optimizer.param_groups]
        wrapped, prepared = self._accelerator.prepare(model, optimizer)
        average = WeightAverage(model, self.options.ema_decay) if self.options.ema_decay > 0 and name == "model" else None
        self._parts[name] = TrainedPart(name, model, prepared, average)
        return wrapped, prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Give the model without the wrapper of several processes."""
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the run's precision; update and evaluation do so by themselves."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._uses_bf16)

    def seed_step(self, step: int) -> None:
        """Seed every generator from (seed, step, rank), so that resuming needs no generator state."""
        seed_everything(self.options.seed, step, self._accelerator.process_index)

    def steps(self, dataset: Dataset[Any]) -> Iterator[tuple[int, list[Any]]]:
        """Give (step, micro batches on the device) from where the run stands until it is finished.

        On Ctrl-C or SIGTERM the step in progress ends, a checkpoint is saved and SystemExit(130 or 143) leaves the loop.
        """
        if self.is_finished:
            self.say(f"{self.path} is finished, at step {self.step}: raise max_steps or max_minutes to train on.")
            return
        if self._resume_from is not None:
            for part in self._parts.values():
                part.load(self._resume_from)
            self.say(f"Resuming {self.path} after step {self.step}.")
        self._interrupts.catch()
        loader = iter(self._loader(dataset))
        self._clock.start()
        while not self._exit_status:
            self._current = self.step + 1
            batches = [send_to_device(next(loader), self.device) for _ in range(self.options.gradient_accumulation)]
            self.seed_step(self._current)
            yield self._current, batches
            assert self.step == self._current, "after_step was not called"
        self._progress.close()
        self.say(self._clock.farewell(self._exit_status, self._best_key))
        if self._exit_status > SIGNALLED:
            raise SystemExit(self._exit_status)

    def update(
        self, model: nn.Module, optimizer: Optimizer, batches: Sequence[Any], compute_loss: ComputeLoss
    ) -> dict[str, Tensor]:
        """Make one optimizer step over the micro batches: accumulate, clip, set the rate, step, average the weights.

        compute_loss(model, batch) gives a scalar loss and scalars to log. Gives their means over the micro batches, with loss,
        gradient_norm and lr. Raises TrainingError, before any weight changes, when loss or gradient is not finite.
        """
        optimizer.zero_grad(set_to_none=True)
        logs: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else self._accelerator.no_sync(model):
                with self.autocast():
                    loss, extra = compute_loss(model, batch)
                self._accelerator.backward(loss / len(batches))
            for key, value in {**extra, "loss": loss}.items():
                share = torch.as_tensor(value, device=self.device).detach() / len(batches)
                logs[key] = logs[key] + share if key in logs else share
        norm = self._accelerator.clip_grad_norm_(model.parameters(), self.options.clip_norm)
        logs["gradient_norm"] = torch.as_tensor(norm, device=self.device).detach()
        logs["loss"] = self._accelerator.reduce(logs["loss"], "mean")
        rate = self._clock.learning_rate(self._current)
        self._check_finite(float(logs["loss"]), float(logs["gradient_norm"]), rate)
        part = next(part for part in self._parts.values() if part.model is self.unwrap(model))
        for group, rate_share in zip(optimizer.param_groups, self._rate_shares[part.name], strict=True):
            group["lr"] = rate * rate_share
        optimizer.step()
        if part.average is not None:
            part.average.update(part.model, self._current)
        return logs | {"lr": torch.tensor(rate, dtype=torch.float64)}

    def after_step(self, step: int, logs: Mapping[str, Any], evaluate: Evaluate | None = None, save: Save | None = None) -> None:
        """Log, and where the step is due evaluate, save model/ and write a checkpoint; decides whether the run ends.

        Both see the evaluation weights in the model given to `prepare`. evaluate runs in every process, on the same data.
        save(folder) runs in the main process when the best value improves or, without evaluate, at every checkpoint.
        """
        self._state.step = step
        status = self._clock.end_step()
        self._log_step(step, logs)
        # Clocks and signals differ between processes: the main one decides for all.
        status, is_measured = from_main((self._interrupts.exit_status or status, self._clock.is_plan_due()))
        is_last = 0 < status < SIGNALLED
        if evaluate is not None and (is_last or is_measured or step % self.options.evaluate_every == 0):
            if status > SIGNALLED:
                self._save_checkpoint()  # whoever sent the signal may not wait for the evaluation
            self._evaluate(step, evaluate, save)
        if status == TIME_IS_UP:
            self._state.minutes_used_up = self.options.max_minutes or 0.0
        if status or is_measured or step % self.options.checkpoint_every == 0:
            if evaluate is None and save is not None:
                self._save_model(save)
            self._save_checkpoint()
        if is_measured and not status:
            self._make_plan()
            # Minutes that measuring has used up leave no step to plan.
            status = ALL_STEPS if self._clock.is_finished else status
        self._exit_status = status

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Put every model in eval mode, with averaged weights where averaging is on; all is as before afterwards."""
        with ExitStack() as stack:
            for part in self._parts.values():
                stack.enter_context(part.evaluating())
            yield

    def evaluation_batches(self, dataset: Dataset[Any], max_items: int) -> Iterator[Any]:
        """Give batches on the device of at most max_items items, spread evenly over the data set, always the same ones."""
        for batch in DataLoader(spread(dataset, max_items), batch_size=self.options.batch_size):
            yield send_to_device(batch, self.device)

    def _open(self, config: Mapping[str, Any], name: str) -> tuple[TrainState, Path | None]:
        self._folder = RunFolder(self.path, config, name)
        checkpoint = checkpoints.newest_checkpoint(self._folder.checkpoints)
        try:
            state = TrainState() if checkpoint is None else checkpoints.read_state(checkpoint)
        except ValueError:
            self._folder.close()
            raise
        self._folder.drop_metrics_after(state.step)
        state = replace(state, config=self._folder.config, plan=self._folder.read_plan() or state.plan)
        if renew_plan(self.options, state):
            self._folder.write_plan(state.plan)
        return state, checkpoint

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        options, horizon = self.options, self._clock.horizon
        sampler = StepSampler(
            num_items=len(dataset),  # type: ignore[arg-type]
            batch_size=options.batch_size,
            seed=options.seed,
            start_step=self.step * options.gradient_accumulation,
            num_steps=None if horizon is None else (horizon - self.step) * options.gradient_accumulation,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
        )
        automatic = 0 if self.device.type == "cpu" else 2
        num_workers = automatic if options.num_workers is None else options.num_workers
        return build_loader(dataset, sampler, num_workers=num_workers, pin_memory=self.device.type == "cuda")

    def _check_finite(self, loss: float, gradient_norm: float, rate: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingError(
                f"Training stopped at step {self._current}: loss {loss:.4g}, gradient norm {gradient_norm:.4g}, lr {rate:.2e}; "
                f"{self._newest()}. Try a lower lr, a longer warmup_steps or precision=fp32, in a new run_dir."
            )

    def _newest(self) -> str:
        return checkpoints.describe_newest(self.path / "checkpoints")

    def _log_step(self, step: int, logs: Mapping[str, Any]) -> None:
        seconds = self._clock.step_seconds
        rate = self._clips / max(seconds, 1e-9)
        self._progress.show(step, self._clock.horizon, float(logs["loss"]), rate, seconds)
        if step == 1 or step % self.options.log_every == 0:
            self._write({key: float(value) for key, value in logs.items()} | {"clips_per_second": rate})

    def _write(self, values: Mapping[str, float]) -> None:
        if self._folder is not None:
            self._folder.append_metrics({"step": self.step, **values, "elapsed_seconds": self._clock.elapsed_seconds})
        self._accelerator.log(dict(values), step=self.step)

    def _evaluate(self, step: int, evaluate: Evaluate, save: Save | None) -> None:
        started = time.monotonic()
        self.seed_step(0)  # every evaluation draws the same numbers
        with self.evaluation_weights(), torch.no_grad(), self.autocast():
            values = from_main({key: float(value) for key, value in evaluate().items()})
        if self._best_key not in values:
            raise ValueError(f"evaluate gave {sorted(values)}, without {self._best_key!r}, which picks the best model.")
        value, best = values[self._best_key], self._state.best
        if math.isnan(value):
            raise TrainingError(f"Training stopped at step {step}: {self._best_key} is not a number; {self._newest()}.")
        self._write(values)
        self.say(f"step {step}: " + ", ".join(f"{key} {number:.4g}" for key, number in values.items()))
        # An infinite value (a codebook that is still empty) is no model to keep, not even the first one.
        if math.isfinite(value) and (best is None or (value < best if self._best_is_lowest else value > best)):
            if save is not None:
                self._save_model(save)
            self._state.best, self._state.best_step = value, step
        self._state.evaluation_seconds = time.monotonic() - started
        self._clock.start_step()

    def _save_model(self, save: Save) -> None:
        with self.evaluation_weights():
            on_main(lambda: checkpoints.write_folder(self.path / "model", save))

    def _save_checkpoint(self) -> None:
        started = time.monotonic()
        self._state.elapsed_seconds = self._clock.elapsed_seconds
        folder, keep = self.path / "checkpoints", self.options.keep_checkpoints
        on_main(lambda: checkpoints.save_checkpoint(folder, self._state, self._parts, keep))
        self._state.saving_seconds = time.monotonic() - started
        self._clock.start_step()

    def _make_plan(self) -> None:
        self._clock.make_plan()
        self._state.plan = from_main(self._state.plan)
        if self._folder is not None:
            self._folder.write_plan(self._state.plan)
        self.say(f"{self._clock.horizon} steps fit into {self.options.max_minutes} minutes.")
