"""The demonstration: a service on scanned digits, protected on a real server, attacked, corrected."""
