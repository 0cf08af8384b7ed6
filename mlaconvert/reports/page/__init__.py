"""The HTML report of an evaluation: one file, nothing loaded from elsewhere.

`sections` are what stands on it, `html`, `svg` and `pictures` how that is written, `style.css` how it looks.

    from mlaconvert.reports.page.svg import ticks

    ticks(0, 96, 4)
"""
