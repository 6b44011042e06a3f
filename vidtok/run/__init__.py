"""What a training run is made of: its folder, clock, sampler, optimizer and checkpoints; vidtok.runner puts them together."""
