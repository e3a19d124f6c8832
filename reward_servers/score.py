"""Moved: `rtdmd score`."""

if __name__ == "__main__":
    raise SystemExit("error: python -m reward_servers.score is now a command: rtdmd score")
