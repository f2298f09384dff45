"""Names under which requests and receipts travel through a host. No imports: model servers load this."""

from __future__ import annotations

#: Request parameters (Triton, Open Inference Protocol).
PARAMETER = "fides_request"
COMMITMENT_PARAMETER = "fides_commitment"
#: Output (Triton, Open Inference Protocol): a bytes tensor with the receipt as text in its first element.
RECEIPT_OUTPUT = "FIDES_RECEIPT"
#: The verifier's output with the reference, (N, K) float32, where the scheme lets the host read it.
REFERENCE_OUTPUT = "probabilities"
#: Headers (TorchServe).
REQUEST_HEADER = "X-Fides-Request"
COMMITMENT_HEADER = "X-Fides-Commitment"
RECEIPT_HEADER = "X-Fides-Receipt"
