"""The application: an image classifier from its settings to its model card."""
