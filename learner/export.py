"""Moved: `rtdmd export`."""

if __name__ == "__main__":
    raise SystemExit("error: python learner/export.py is now a command: rtdmd export")
