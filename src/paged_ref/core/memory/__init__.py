"""Which slots hold which token: three managers, and the arrays that they speak of."""
