"""Distillation: from a service's answers to a verification model."""
