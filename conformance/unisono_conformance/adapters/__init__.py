"""One adapter a framework: the only files of the court that import one."""
