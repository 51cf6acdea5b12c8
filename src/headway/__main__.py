"""`python -m headway` is `headway`."""

from headway.cli import app

if __name__ == "__main__":
    app(prog_name="headway")
