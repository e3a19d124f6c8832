"""The learner, and the driver that starts and connects all services."""
