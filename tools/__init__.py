"""residency-tools: what testers and trainers use; shares its logic with the agent."""
