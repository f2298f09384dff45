"""Recorded predictions, judged after the fact by the pipeline that serves."""
