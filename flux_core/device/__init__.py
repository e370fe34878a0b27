"""Where to compute: the choice of device and dtype, its memory, CPU threads, and what to do when memory runs out."""
