"""Run files and monitoring settings; a package, so that a wheel carries the run files."""
