"""The service model: asked as a teacher, wherever it runs."""
