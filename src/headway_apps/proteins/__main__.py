"""`python -m headway_apps.proteins`, as torchrun starts it: the same commands as `headway proteins`."""

from headway_apps.proteins.cli import app

if __name__ == "__main__":
    app(prog_name="headway proteins")
