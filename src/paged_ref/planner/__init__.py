"""What paging would buy: traces, simulation, comparison, assessment."""
