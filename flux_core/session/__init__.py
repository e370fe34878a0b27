"""An exploration's folder: what it should hold, its record, its locks, and how it is stopped and resumed."""
