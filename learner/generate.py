"""Moved: `rtdmd generate`."""

if __name__ == "__main__":
    raise SystemExit("error: python learner/generate.py is now a command: rtdmd generate")
