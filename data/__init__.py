"""Data: folders, tables and Hub datasets as the batches of each optimizer step, the same ones however they are spread.

`samples.open_data` finds the samples, a `stream.BatchStream` in a `DataLoader` orders and prepares them by a collator,
`skipped.SkippedSamples` counts the bad ones.
"""
