"""Which form a layer's norms take on a GPU: what was measured decides where it is known, the cost model elsewhere."""

from hf_clars.grad_norms.choice.forms import Choice, FormChoices, cheapest_form, form_choices
from hf_clars.grad_norms.choice.layers import LayerForm, LayerForms, layer_forms

__all__ = ["Choice", "FormChoices", "LayerForm", "LayerForms", "cheapest_form", "form_choices", "layer_forms"]
