"""How good a predicted video is in pixels: frames, motion, drift, distributions, and the rows that give the figures meaning.

Clips are (B, C, T, H, W) in [-1, 1] as everywhere in vidtok (frames.as_video converts uint8 frames); figures are taken in [0, 1] or in
grey levels of 255, as their names say. Nothing here reads a file of video: a lossy codec would be measured along.
"""
