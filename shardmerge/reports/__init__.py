"""The report of a published directory: one HTML file that says where every byte is from. Made of its receipt alone.

What only a run knows, how long it took and how much memory, is kept by a ``timeline.Timeline`` while it runs. It is
in the page and never in the receipt, which is the same for equal runs.
"""
