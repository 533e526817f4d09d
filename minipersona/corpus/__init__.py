"""Where rows come from, the order in which a run sees them, and how they are packed."""
