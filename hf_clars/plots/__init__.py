"""Pictures of a run, drawn without a display, and an interactive page of it."""

from hf_clars.extras import needing_an_extra

with needing_an_extra("Drawing a run"):
    from hf_clars.plots.comparison import plot_comparison
    from hf_clars.plots.gradient_variance import plot_gradient_variance
    from hf_clars.plots.layer_rates import plot_layer_rates
    from hf_clars.plots.noise_scale import plot_noise_scale
    from hf_clars.plots.page import write_page
    from hf_clars.plots.runs import Run, open_runs
    from hf_clars.plots.style import PlotError
    from hf_clars.plots.training_curves import plot_training_curves

__all__ = [
    "PlotError",
    "Run",
    "open_runs",
    "plot_comparison",
    "plot_gradient_variance",
    "plot_layer_rates",
    "plot_noise_scale",
    "plot_training_curves",
    "write_page",
]
