"""The text that exports are verified on where no other is given. Written for this project."""

PROSE = """\
The harbour master kept two ledgers. In the first she wrote what every ship had declared: tons of barley, bales of \
wool, the number of men. In the second she wrote what the ship looked like when it came in, how deep it sat and how \
slowly it turned, and at the end of each month she laid the two books side by side. "A ship can say what it likes," \
she told the boy who carried her lamp, "but the water knows its weight."

He asked what she did when the books disagreed. Nothing at first, she said; a wet autumn makes everything heavier, and \
an honest captain can count badly. She marked the line and waited for the same ship to come again. Three marks in a \
year, and she went down to the quay herself with a rope and a lead, before anybody had time to move the cargo.

In 1847 the town bought a crane, and the council asked whether one of the ledgers could now be saved. It would have \
cost 12 shillings less a year. She answered in writing: a second measurement is only expensive until the first one is \
wrong. The council, which had 3 merchants and a priest in it, voted to keep both books, and the boy, who was by then a \
clerk with a lamp of his own, copied out her letter and pinned it above the desk.

def weigh(declared, draught):
    return abs(declared - draught) <= 0.02 * declared

What does a reader take from this? Perhaps only that trust is cheaper when it is checked now and then; that the check \
should not come from the one who is checked; and that whoever makes a thing smaller ought to keep the larger one \
near by, long enough to compare them.
"""
