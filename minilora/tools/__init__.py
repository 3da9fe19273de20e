"""Commands that look at a run before or after it: plan, tune, doctor, preview, inspect, verify."""
