"""Who may ask, what for, and how much: API keys, policies, budgets."""
