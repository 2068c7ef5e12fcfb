"""Measurements that the documents quote; each module prints a table and writes JSON."""
