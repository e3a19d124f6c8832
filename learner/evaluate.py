"""Moved: `rtdmd evaluate`."""

if __name__ == "__main__":
    raise SystemExit("error: python learner/evaluate.py is now a command: rtdmd evaluate")
