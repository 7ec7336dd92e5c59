"""Coverage-guided fuzzing of everything that reads bytes of somebody else's making; see ``tests.fuzz.__main__``."""
