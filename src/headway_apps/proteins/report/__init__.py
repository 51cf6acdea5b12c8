"""A run as one page: what was trained on what, how it went, and how good it is.

run.py       what a run's folder holds, and what it lacks
figures.py   the curves and bars as PNG, for light and for dark
page.py      the HTML
write.py     the page with its figures beside it
"""
