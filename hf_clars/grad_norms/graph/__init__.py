"""What no rule serves: norms at the nodes where the autograd graph uses a parameter."""
