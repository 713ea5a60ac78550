"""The course's plumbing: rendering, labs' machinery, command line. The subject matter is in the modules one folder up."""
