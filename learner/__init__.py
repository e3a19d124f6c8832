"""The learner, and the driver that composes all services."""
