"""Everything that sees or runs the model: its layers, its features, its gradients, the references."""
