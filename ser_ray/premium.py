"""The name of ``python -m ser_ray.leakage`` before version 0.2; it still works."""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["premium", *sys.argv[1:]]))
