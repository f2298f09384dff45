"""Models whose requests Triton may refuse before they run. Such a refusal harms the ensemble around them.

A refusal comes while the steps of the ensemble are being started. Triton 2.51 crashes then, or never
answers, depending on the order of the steps. A refusal of a model inside the protected model, where
that is an ensemble itself, comes as an answer and is harmless; so does a time-out in the queue.
"""

from __future__ import annotations

from typing import Any


def queue_problem(config: Any) -> tuple[str, str]:
    """What makes Triton refuse requests of this model (a `ModelConfig`) at once, and the remedy; or two empty texts."""
    if config.WhichOneof("scheduling_choice") == "sequence_batching":
        return (
            "has sequence_batching: its answer depends on earlier requests, which a verification model does not see, "
            "and a request without a correlation id would end the whole server inside an ensemble.",
            "Protect a model without it.",
        )
    batching = config.dynamic_batching
    policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
    if any(policy.max_queue_size for policy in policies):
        return (
            "has a max_queue_size in its queue policy: a full queue would end the whole server inside an ensemble.",
            "Bound the waiting time instead: timeout_action: REJECT with default_timeout_microseconds. Or protect an "
            "ensemble with this model as its one step; clients then get the 503 as before.",
        )
    return "", ""
