"""Run a stage: `python -m benchmarks.gpu checks`, `loss` or `steps`; record results; carry packages along."""

from benchmarks.gpu.command import main

if __name__ == "__main__":
    main()
