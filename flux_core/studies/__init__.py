"""One request in, files out: each study is what one command does. Studies do not import each other."""
