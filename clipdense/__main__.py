"""``python -m clipdense``: the same as the console command ``clipdense``."""

from clipdense.run.cli import main

if __name__ == "__main__":
    main()
