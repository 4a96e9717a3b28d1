"""Measures of samples against real data, and the page that shows them."""
