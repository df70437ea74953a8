// What Python asks about the tiles.
#include "tiles.h"

extern "C" int int8pass_has_tiles() { return int8pass::use_tiles; }

// For tests: off and on again (where the processor and the system have them). Returns what was in force.
extern "C" int int8pass_use_tiles(int on) {
  const int before = int8pass::use_tiles;
  int8pass::use_tiles = on != 0 && int8pass::ask_for_tiles();
  return before;
}
