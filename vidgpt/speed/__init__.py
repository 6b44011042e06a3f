"""How fast decoding is on this machine: vidgpt-bench, and what makes it faster."""
