"""What pytest is not to look for tests in."""

collect_ignore_glob = ["models/*.py"]  # they import flash_attn, which is there only once a test has put it there
