"""Why a candidate differs: another convention, other roundings, or a mistake that ports make."""
