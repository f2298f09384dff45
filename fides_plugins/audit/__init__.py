"""What an auditor needs: a log that shows tampering, and verdicts over recorded predictions.

- `audit`: the plug-in that writes a hash-chained log (`plugins.load: fides_plugins.audit:audit`).
- `verify`: finds any line that was removed, moved or altered (`fides audit verify`).
- `run`: validates predictions after the fact, on one machine or on Ray (`fides audit run`).
"""

from fides_plugins.audit.log import AuditLog

#: The plug-in under the name that settings use for its options (`plugins.options.audit`).
audit = AuditLog

__all__ = ["AuditLog", "audit"]
