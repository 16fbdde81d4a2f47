"""Runs of tests that end without their picture and page, which take longer to draw than most of these runs to train."""


def draw_nothing():
    """Let the runs of this process draw nothing at their end; returns what undoes it."""
    from hf_clars.plots import products

    draw_run = products.draw_run
    products.draw_run = lambda *args, **kwargs: []

    def undo():
        products.draw_run = draw_run

    return undo
