"""Who is resident: slots, policies, plans, look-ahead, statistics. Plain Python over integers."""
