"""What several tests use: small models, independent implementations, scripts run in processes."""
