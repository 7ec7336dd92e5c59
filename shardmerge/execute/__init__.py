"""Carries out a plan: moves every data byte once, in bounded memory, and decides nothing."""
